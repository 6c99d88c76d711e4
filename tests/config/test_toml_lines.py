"""Line numbers: keys of one name in several tables, dotted, quoted, inline, behind long strings and arrays."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.toml_lines import KeyPath, scan

TEXT = '''\
top = 1 # = [ "
[network]
name = "a"
"quoted key" = 'x # y'
args.inner . deep = [
  1, # one ] "
  { a = 1, b = """
two lines ] } """ },
]

[training]
name = """
name = 2
[network]
"""
literal = \'\'\'
\\ " \'\'\'
when = 1979-05-27 07:32:00
last = { x = { y = 2 }, "z.w" = [ [1], [2] ] }
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = 'C:\\new'
[[datasets.subsets]]
image_dir = "b"
[[datasets]]
resolution = 768
[[datasets.subsets]]
image_dir = "c\\"]"
'''

EXPECTED: dict[KeyPath, int] = {
    ("top",): 1,
    ("network",): 2,
    ("network", "name"): 3,
    ("network", "quoted key"): 4,
    ("network", "args", "inner", "deep"): 5,
    ("network", "args", "inner", "deep", 1, "b"): 7,
    ("training",): 11,
    ("training", "name"): 12,
    ("training", "literal"): 16,
    ("training", "when"): 18,
    ("training", "last", "x", "y"): 19,
    ("training", "last", "z.w"): 19,
    ("datasets", 0): 20,
    ("datasets", 0, "resolution"): 21,
    ("datasets", 0, "subsets", 0, "image_dir"): 23,
    ("datasets", 0, "subsets", 1, "image_dir"): 25,
    ("datasets", 1, "resolution"): 27,
    ("datasets", 1, "subsets", 0): 28,
    ("datasets", 1, "subsets", 0, "image_dir"): 29,
}


@pytest.mark.parametrize(("path", "line"), EXPECTED.items(), ids=str)
def test_the_line_of_a_key(path: KeyPath, line: int) -> None:
    tomllib.loads(TEXT)
    assert scan(TEXT).of(path) == line


def test_the_line_of_a_deeper_place_is_that_of_its_key() -> None:
    assert scan(TEXT).of(("network", "name", 3)) == 3
    assert scan("").of(("nothing",)) is None


def test_a_key_defined_twice_is_found_with_both_lines() -> None:
    found = scan("a = 1\n[t]\nb = 2\nc = 3\nb = 4\n").twice()
    assert found == [(("t", "b"), [3, 5])]
    assert scan(TEXT).twice() == []


def test_tables_that_meet_in_dotted_headers_are_not_twice() -> None:
    text = "[a.b]\nx = 1\n[a]\ny = 2\n[a.c]\nz = 3\n"
    tomllib.loads(text)
    assert scan(text).twice() == []
    assert scan("[a]\n[b]\n[a]\n").twice() == [(("a",), [1, 3])]


@given(st.text(alphabet="ab=[]{}\"'#\\,. \n\t1é", max_size=60))
def test_any_text_is_survived(text: str) -> None:
    scan(text)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,6}", fullmatch=True),
        st.one_of(st.integers(-9, 9), st.booleans(), st.text("ab#[]'= ", max_size=8), st.lists(st.integers(0, 9))),
        max_size=6,
    )
)
def test_every_key_of_a_flat_file_is_found_on_its_line(content: dict[str, object]) -> None:
    import toml

    text = "".join(toml.dumps({name: value}) for name, value in content.items())
    found = scan(text)
    for number, name in enumerate(content, start=1):
        assert found.of((name,)) == number
