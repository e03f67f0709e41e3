"""What DATABASE_URL may say, and what becomes of what it may not."""

from pathlib import Path

import pytest

from controlplane.database import database_settings


def test_a_url_becomes_the_parts_of_a_connection() -> None:
    made = database_settings("postgres://team%40a:p%2Fw@db.example:5433/penstock?sslmode=require", Path("var"))
    assert [made[name] for name in ("USER", "PASSWORD", "HOST", "PORT", "NAME")] == [
        "team@a", "p/w", "db.example", 5433, "penstock",
    ]  # fmt: skip
    assert made["OPTIONS"]["sslmode"] == "require"


@pytest.mark.parametrize(
    "url", ["mysql://host/name", "postgres://host/", "postgres://host:abc/name", "postgres://[a/n"]
)
def test_a_url_that_cannot_be_used_ends_the_start_with_a_sentence_without_its_password(url: str) -> None:
    url = url.replace("://", "://user:secret@")
    with pytest.raises(SystemExit) as caught:
        database_settings(url, Path("var"))
    assert str(caught.value).startswith("DATABASE_URL ")
    assert "secret" not in str(caught.value)
