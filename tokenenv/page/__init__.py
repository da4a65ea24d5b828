"""Pages for a browser: their data, and the HTML, style and scripts that show it.

A page is one HTML file that needs nothing else. Its data lies in it as JSON; the scripts in
``assets`` set what they read there as text, never as HTML. Charts are plain SVG: they hold a few
dots, each of which is a link that a keyboard and a screen reader reach, which charting libraries
that draw on a canvas do not offer.
"""
