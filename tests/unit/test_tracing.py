"""What spans of HTTP requests are called."""

import pytest

from controlplane.tracing import name_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/files/file-0123456789abcdef/content", "/v1/files"),
        ("/v1/batches/batch_0123456789abcdef", "/v1/batches"),
        ("/v1/models/org/model", "/v1/models"),
        ("/v1/anything/else", "/v1"),
        ("/requests/cmpl-0123456789abcdef/", "dashboard"),
    ],
)
def test_a_span_s_name_holds_no_id_and_nothing_that_a_client_chose(path: str, name: str) -> None:
    assert name_of(path) == name
