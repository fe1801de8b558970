"""A file is read and written alike on every platform."""

import ast

import pytest


def python_files(root):
    for folder in (".", "experiments", "tests", "tests/peers"):
        yield from sorted((root / folder).glob("*.py"))


def opens_text_without_encoding(call):
    """Whether this call reads or writes text in the encoding of the locale."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    function = ast.unparse(call.func)
    if function == "open":
        mode = keywords.get("mode")
        if len(call.args) > 1:
            mode = call.args[1]
        binary = mode is not None and "b" in ast.unparse(mode)
        return not binary
    if function.endswith((".read_text", ".write_text")):
        return True
    return "text" in keywords and function.startswith("subprocess.")


def test_every_text_file_names_its_encoding(root):
    found = []
    for path in python_files(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and opens_text_without_encoding(node):
                where = f"{path.relative_to(root)}:{node.lineno}"
                found.append(f"{where}: {ast.unparse(node)} names no encoding: in a Latin-1 locale")
                found.append("  this file would be read or written in another one")
    assert not found, "\n".join(found)


CALLS = {  # a call, and whether it leaves the encoding to the locale
    "open(path)": True,
    "open(path, 'w')": True,
    "open(path, mode='a', newline='')": True,
    "open(path, 'rb')": False,
    "open(path, mode='wb')": False,
    "open(path, 'w', encoding='utf-8')": False,
    "path.read_text()": True,
    "(folder / 'log').write_text(text)": True,
    "path.read_text(encoding='utf-8')": False,
    "path.read_bytes()": False,
    "Image.open(path)": False,
    "subprocess.run(command, text=True)": True,
    "subprocess.run(command, encoding='utf-8')": False,
    "subprocess.run(command)": False,
}


@pytest.mark.parametrize("source", CALLS)
def test_the_check_of_encodings_can_fail(source):
    call = ast.parse(source).body[0].value
    assert opens_text_without_encoding(call) == CALLS[source]
