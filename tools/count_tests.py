"""Prints one closing line, "total: N passed, N failed, N skipped", from JUnit reports (ctest's and pytest's).

Usage: count_tests.py REPORT_XML... Exit status 1 if a test failed or none ran.
"""

import sys
from xml.etree import ElementTree


def count(path):
    """(passed, failed, skipped) of one report; a test case with an error counts as failed."""
    passed = failed = skipped = 0
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is not None or case.get("status") in {"notrun", "disabled"}:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def main(paths):
    passed, failed, skipped = map(sum, zip(*map(count, paths), strict=True))
    print(f"total: {passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
