"""Pages to look at: charts, and HTML files that hold everything they need.

    charts.py   numbers by name → an SVG or PNG
    page.py     title, sections, tables, charts → one HTML file

Neither knows what a merge is; whoever has something to show calls both.
"""
