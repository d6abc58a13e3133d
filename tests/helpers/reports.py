"""Quick reports, and the numbers that are in a page."""

import json
import re

import apt_ext


def numbers_in(page):
    """The JSON that a page holds."""
    (found,) = re.findall(r'<script type="application/json" id="numbers">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found)


def numbers_of(tmp_path, model, controller=None, **options):
    """The numbers of a report, by default without a clock."""
    page = tmp_path / "of.html"
    assert apt_ext.report(model, controller, page, **{"rounds": 0, **options}) == str(page)
    return numbers_in(page)
