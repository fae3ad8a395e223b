"""OpenAI's interface over HTTP.

::

    bytes ──guard.py──> host and key checked ──reading.py──> body within limits, JSON
          ──bodies.py──> checked fields ──handlers.py──> Call ──Router──> events
    events ──answers.py──> one JSON object, or chunks ──streaming.py──> bytes, until the client goes

app.py puts it together; every refusal leaves by refusals.py in OpenAI's form.
"""
