"""docs/reliability.md promises nothing that no test shows: each test it names exists, and ran. This file runs last."""

import pytest
from proofs import DOC, NEEDS, at_hand, exists, missing, never_ran, rows


def test_every_row_has_a_promise_and_a_proof_that_exists():
    found = list(rows(DOC.read_text()))
    assert len(found) > 60 and len({fault for fault, _, _ in found}) == len(found)
    assert [fault for fault, promise, proofs in found if not promise or not proofs] == []
    assert [(proof, need) for _, _, proofs in found for proof, need in proofs if not exists(proof) or need not in NEEDS] == []


def test_every_proof_ran(request):
    if hasattr(request.config, "workerinput"):
        pytest.skip("the session that controls this process asks it at its end")
    assert missing(request.config, {item.nodeid.partition("::")[0] for item in request.session.items}) == []


def test_the_check_notices():
    assert exists("make asan") and not exists("make nothing")
    assert exists("tests/install/run.sh sdist") and not exists("tests/install/run.sh uv")
    own = "tests/docs/test_reliability_doc.py::test_the_check_notices"
    assert exists(own) and not any(
        exists(name) for name in (f"{own}s", "tests/none.py::test", "tests/docs/test_reliability_doc.py", own[6:])
    )
    file = own.partition("::")[0]
    for outcomes, missed in (({}, True), ({own: {"skipped"}}, True), ({own: {"passed", "skipped"}}, False), ({own: {"failed"}}, False)):
        assert never_ran([(own, "")], {file}, outcomes, {""}) == [own] * missed
        assert never_ran([(own, "CUDA")], {file}, outcomes, {"", "CUDA"}) == [own] * missed
        assert never_ran([(own, "CUDA")], {file}, outcomes, {""}) == never_ran([(own, "")], set(), outcomes, {""}) == []
    assert "" in at_hand("not slow") and "slow" in at_hand("") and not {"slow", "large"} & at_hand("not slow")
    with pytest.raises(AssertionError, match="proofs alone"):
        list(rows("| a | b | see `make asan` |"))
