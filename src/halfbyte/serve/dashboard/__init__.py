"""A page that shows what the server does, live.

::

    page.html, page.css, page.js   open: they hold no figures
    /dashboard/data                behind the key: `Quality.snapshot()` as JSON, asked every second
"""
