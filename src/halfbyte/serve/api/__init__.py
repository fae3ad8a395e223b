"""OpenAI's interface over HTTP.

::

    bytes ──connection.py──> HTTP ──access_control.py──> host and key checked
          ──app.py──> its handler
          ──request_body.py──> body within limits, JSON ──request_schemas.py──> checked fields
          ──gateway.py──> Call ──Router──> events
    events ──answers.py──> one JSON object, or chunks ──streaming.py──> bytes, until the client goes

app.py puts it together as well; every refusal leaves by error_responses.py in OpenAI's form.
"""
