"""OpenAI's HTTP API.

::

    bytes ──connection.py──> HTTP ──access_control.py──> host and API key checked
          ──app.py──> handler
          ──request_body.py──> size-limited JSON ──request_schemas.py──> validated fields
          ──gateway.py──> Call ──Router──> events
    events ──answers.py──> one JSON object, or chunks ──streaming.py──> bytes

app.py builds the application; error_responses.py formats every error as OpenAI does.
"""
