"""OpenAI's interface over HTTP.

::

    bytes ──connection.py──> HTTP ──guard.py──> host and key checked ──app.py──> its handler
          ──reading.py──> body within limits, JSON ──bodies.py──> checked fields
          ──gateway.py──> Call ──Router──> events
    events ──answers.py──> one JSON object, or chunks ──streaming.py──> bytes, until the client goes

app.py puts it together as well; every refusal leaves by refusals.py in OpenAI's form.
"""
