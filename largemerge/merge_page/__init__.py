"""The page of a finished merge: `largemerge report OUT`, from what lies in OUT.

    facts.py      OUT/merge_report.json, of any version → what the page is made of, by block and candidate
    findings.py   which block or candidate stands out
    sections.py   tables and charts
    build.py      all of it as a page, written to a file

It reads files, and knows neither kind of merge from the inside.
"""
