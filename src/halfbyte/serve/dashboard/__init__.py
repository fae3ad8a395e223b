"""A web page that shows the server's state, updated every second.

::

    page.html, page.css, page.js   need no API key: they contain no data
    /dashboard/data                needs a key: `Quality.snapshot()` as JSON, polled every second
"""
