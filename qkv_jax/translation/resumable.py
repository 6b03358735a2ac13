"""Much text translated so that a call that was killed can be gone on with."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qkv_jax import training
from qkv_jax.translation.models import params_digest
from qkv_jax.translation.translator import Translator

SENTENCES = 1024


def translate_resumably(
    translator: Translator,
    texts: Sequence[str],
    part: Path,
    *,
    count: int = 1,
    say: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """The `count` best translations of each text, or so many samples, kept in a file as they come.

    Args:
        translator: the model.
        texts: any number.
        part: where they are kept, `SENTENCES` texts at a time. Where it is there and of the same
            model, search and texts, what it holds is not made again. It stays when all is done.
        count: of translations of a text.
        say: is told how many texts are done.

    Raises:
        RunError: the file is of something else, or cannot be written; it is left as it is.
    """
    # By length: the fewest shapes and the least padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    done = _done(part, _digest(translator, texts, count))
    for begin in range(len(done), len(texts), SENTENCES):
        some = [texts[i] for i in order[begin : begin + SENTENCES]]
        found = translator(some, n_best=count)
        made = [[one.text for one in several[:count]] for several in found]
        _append(part, made)
        done += made
        if say is not None:
            say(len(done))
    of_text = dict(zip(order, done))
    return [of_text[i] for i in range(len(texts))]


def _digest(translator: Translator, texts: Sequence[str], count: int) -> str:
    """Of all that decides what comes out."""
    decoding = dataclasses.asdict(translator.decoding)
    told = [decoding, translator.tokenizer.digest, count, list(texts)]
    whole = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    whole.update(params_digest(translator.params).encode())
    return whole.hexdigest()


def _done(part: Path, asked: str) -> list[list[str]]:
    """What the file holds; it is begun where it is not there, and cut after its last whole line."""
    try:
        if not part.exists():
            part.write_text(asked + "\n", encoding="utf-8")
            return []
        content = part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.decode("utf-8").splitlines() or [""]
        if whole and first != asked:
            raise training.RunError(
                f"{part} was begun by another model, with other options or of other text: remove it "
                "to begin anew, or choose another output."
            )
        if not whole:
            part.write_text(asked + "\n", encoding="utf-8")
        elif len(whole) < len(content):
            os.truncate(part, len(whole))
        return [json.loads(line) for line in lines]
    except OSError as error:
        raise training.RunError(f"{part} cannot be used: {error.strerror}.") from error
    except ValueError as error:
        raise training.RunError(
            f"{part} is damaged ({error}): remove it to begin anew."
        ) from error


def _append(part: Path, made: Sequence[Sequence[str]]) -> None:
    # ASCII: no separator of lines that a text may hold ends a line of the file.
    lines = "".join(json.dumps(several) + "\n" for several in made)
    try:
        with part.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise training.RunError(
            f"{part} cannot be written: {error.strerror}."
        ) from error
