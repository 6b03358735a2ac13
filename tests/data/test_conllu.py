import pytest

from qkv_jax.data import DataError
from qkv_jax.data.conllu import read_conllu

TEXT = """\
# text = zum alten Hund
1-2\tzum\t_\t_\t_\t_\t_\t_\t_\t_
1\tzu\tzu\tADP\t_\t_\t4\tcase\t_\t_
2\tdem\tder\tDET\t_\t_\t4\tdet\t_\t_
3\talten\talt\tADJ\t_\t_\t4\tamod:x\t_\t_
3.1\t_\t_\t_\t_\t_\t_\t_\t_\t_
4\tHund 1\tHund\tNOUN\t_\t_\t0\troot\t_\t_

1\tja\tja\tINTJ\t_\t_\t0\troot\t_\t_
"""


def _row(number, head):
    return "\t".join([str(number), "a", *"____", str(head), "nsubj", "_", "_"])


def test_words_heads_and_relations_are_read(tmp_path):
    (tmp_path / "a.conllu").write_text(TEXT, "utf-8")
    first, second = read_conllu(tmp_path / "a.conllu")
    assert first.words == ["zu", "dem", "alten", "Hund_1"]
    assert first.heads == [3, 3, 3, -1]
    assert first.relations == ["case", "det", "amod", "root"]
    assert second == (["ja"], [-1], ["root"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no sentence"),
        ("1 a _ _ _ _ 0 root _ _\n", "line 1: a line of CoNLL-U has 10 columns"),
        (
            f"# a\n{_row(1, 0)}\n{_row(3, 1)}\n",
            "sentence of line 2: words must be numb",
        ),
        (_row(1, 2), "the head of word 1 must be in 0 .. 1; got '2'"),
        (_row(1, "_"), "the head of word 1 must be in 0 .. 1; got '_'"),
    ],
)
def test_what_is_no_conllu_is_named(tmp_path, content, expected):
    (tmp_path / "a.conllu").write_text(content, "utf-8")
    with pytest.raises(
        DataError, match=r"a\.conllu.*" + expected.replace("..", r"\.\.")
    ):
        read_conllu(tmp_path / "a.conllu")
