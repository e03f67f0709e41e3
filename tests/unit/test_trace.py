"""Traces: read plain and compressed, sped up and cut short; what is wrong is named by line and column."""

import gzip
from pathlib import Path

import pytest

from scheduling.core.request import Priority
from scheduling.core.simulation.trace import TraceError, TraceRequest, read_trace

HEADER = "arrival_s,tenant,prompt_tokens,output_tokens\n"


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_plain_and_compressed_traces_read_alike(tmp_path: Path) -> None:
    text = HEADER + "0.000000,conv,374,44\n4.314579,code,396,109\n"
    compressed = tmp_path / "trace.csv.gz"
    compressed.write_bytes(gzip.compress(text.encode()))
    expected = [
        TraceRequest(0.0, "conv", 374, 44, Priority.NORMAL, 44),
        TraceRequest(4.314579, "code", 396, 109, Priority.NORMAL, 109),
    ]
    assert read_trace(write(tmp_path, text)) == expected
    assert read_trace(compressed) == expected


def test_priority_and_max_tokens_are_taken_where_they_are(tmp_path: Path) -> None:
    text = "tenant,priority,arrival_s,max_tokens,prompt_tokens,output_tokens,note\na,high,1,512,3,7,x\na,5,2,7,3,7,y\n"
    first, second = read_trace(write(tmp_path, text))
    assert first == TraceRequest(1.0, "a", 3, 7, Priority.HIGH, 512)
    assert second.priority is Priority.BULK


def test_arrivals_come_faster_by_the_rate_and_end_at_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "".join(f"{i},t,1,1\n" for i in range(10)))
    assert [r.arrival_s for r in read_trace(path, rate=4.0, limit=3)] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,a,1,1\nx,a,1,1\n", "line 3, column arrival_s: 'x' is not a number of seconds"),
        ("nan,a,1,1\n", "line 2, column arrival_s: 'nan'"),
        ("5,a,1,1\n4,a,1,1\n", "line 3, column arrival_s: '4' is earlier than the line before"),
        ("0, ,1,1\n", "line 2, column tenant: ' ' is no name"),
        ("0,a,0,1\n", "line 2, column prompt_tokens: '0' is not a whole number"),
        ("0,a,1,1.5\n", "line 2, column output_tokens: '1.5'"),
        ("0,a,1\n", "line 2, column output_tokens: nothing stands there"),
        ("", "holds no requests"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, HEADER + rows))


def test_optional_columns_are_checked_too(tmp_path: Path) -> None:
    header = "arrival_s,tenant,prompt_tokens,output_tokens,priority,max_tokens\n"
    with pytest.raises(TraceError, match="line 2, column priority: 'top' is none of critical"):
        read_trace(write(tmp_path, header + "0,a,1,1,top,1\n"))
    with pytest.raises(TraceError, match="line 2, column max_tokens: '3' is less than output_tokens"):
        read_trace(write(tmp_path, header + "0,a,1,4,low,3\n"))


def test_an_unusable_file_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="lacks the column tenant; it has: arrival_s"):
        read_trace(write(tmp_path, "arrival_s\n1\n"))
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "absent.csv")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(gzip.compress((HEADER + "0,a,1,1\n").encode())[:-12])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(broken)
    packed = bytearray(
        gzip.compress((HEADER + "".join(f"{i},a,{i % 97 + 1},{i % 89 + 1}\n" for i in range(9999))).encode())
    )
    packed[2000:2100] = bytes(100)
    broken.write_bytes(packed)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(broken)
    with pytest.raises(TraceError, match="rate"):
        read_trace(tmp_path, rate=0.0)
    with pytest.raises(TraceError, match="limit"):
        read_trace(tmp_path, limit=0)


def test_at_another_rate_a_request_has_as_long_until_its_deadline() -> None:
    request = TraceRequest(8.0, "a", 5, 5, deadline_s=11.0)
    assert request.at_rate(4.0) == request._replace(arrival_s=2.0, deadline_s=5.0)
    assert request._replace(deadline_s=None).at_rate(0.5) == request._replace(arrival_s=16.0, deadline_s=None)
