"""Hostile JSON and YAML."""

from __future__ import annotations

# In the place of any file of JSON.
JSON: dict[str, bytes] = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"r": 8}'.encode("utf-16"),
    "cut": b'{"a": [1, 2',
    "a number": b"42",
    "null": b"null",
    "a list": b"[]",
    "an object without anything": b"{}",
    "nested lists": b"[" * 200_000 + b"]" * 200_000,
    "nested objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "NaN": b"NaN",
    "a number of 100,000 digits": b'{"r": ' + b"9" * 100_000 + b"}",
}

_LAUGHS = "\n".join(
    ["a0: &a0 [lol, lol]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    + ["merge_method: nan_ties", "models: *a29"]
)
_KEYS = "\n".join(
    ["a0: &a0 {x: 1, y: 2}"]
    + [f"a{n}: &a{n} {{b: *a{n - 1}, c: *a{n - 1}, d: *a{n - 1}}}" for n in range(1, 40)]
    + ["<<: *a39"]
)

# In the place of a merge's configuration.
YAML: dict[str, bytes] = {
    "empty": b"",
    "only a comment": b"# nothing",
    "a text": b"hello",
    "a list": b"- a\n- b\n",
    "billion laughs": _LAUGHS.encode(),
    "billion laughs of keys": _KEYS.encode(),
    "an alias of itself": b"merge_method: nan_ties\nmodels: &m [*m]\n",
    "an object of Python": b"!!python/object/apply:os.system ['touch owned']\n",
    "a module of Python": b"merge_method: !!python/name:os.system\n",
    "nested flow": b"models: " + b"[" * 300,
    "nested blocks": b"".join(b" " * n + b"a:\n" for n in range(300)),
    "open quote": b"merge_method: 'nan_ties\nmodels: []\n",
    "tabs": b"merge_method:\tnan_ties\n\tmodels: []\n",
    "not UTF-8": b"merge_method: \xff\xfe\n",
    "UTF-16": "merge_method: nan_ties\n".encode("utf-16"),
    "NUL": b"merge_method: nan\x00\n",
    "no date": b"merge_method: 2024-13-45\n",
    "no truth": b"merge_method: !!bool perhaps\n",
    "no number": b"merge_method: !!int many\n",
    "no time": b"merge_method: !!timestamp never\n",
    "no bytes": b"merge_method: !!binary '*'\n",
    "an empty number": b"merge_method: 0x_\n",
    "a number of 10,000 digits": b"merge_method: " + b"9" * 10_000 + b"\n",
    "a hexadecimal number without end": b"merge_method: 0x" + b"f" * 100_000 + b"\n",
    "a number of base sixty": b"merge_method: 1" + b":59" * 2_000 + b"\n",
    "a key that is a list": b"? [a, b]\n: 1\n",
    "a key that is an object": b"? {a: b}\n: 1\n",
    "100,000 values": b"merge_method: nan\nmodels: [" + b"a," * 100_000 + b"]\n",
    "10,000 documents": b"a: 1\n---\n" * 10_000,
    "two documents": b"merge_method: nan\n---\nmerge_method: nan\n",
    "a method that is a list": b"merge_method: [nan]\nmodels: [{model: a}]\n",
    "a method that is an object": b"merge_method: {nan: 1}\nmodels: [{model: a}]\n",
    "no method": b"models: [{model: a}]\n",
    "models that are numbers": b"merge_method: nan_ties\nmodels: [1, 2]\n",
    "models that are null": b"merge_method: linear\nmodels: [null, null]\n",
    "a model that is an object": b"merge_method: nan_ties\nmodels: [{model: {a: [b]}}]\n",
    "a model that is a date": b"merge_method: linear\nmodels: [{model: 2024-01-01}]\n",
    "a model with NUL": b'merge_method: linear\nmodels: [{model: "a\\0b"}]\n',
    "half a surrogate": b'merge_method: linear\nmodels: [{model: "\\ud800"}]\n',
    "an escape sequence": b'merge_method: "\\e[2J"\nmodels: [{model: "\\e[31m"}]\n',
    "a long name": b"merge_method: " + b"n" * 50_000 + b"\nmodels: [{model: a}]\n",
    "parameters that are a list": b"merge_method: linear\nmodels: [{model: a}]\nparameters: [1]\n",
    "a weight that is not finite": (
        b"merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]\n"
    ),
    "keys that are no texts": b"1: 2\nnull: 3\n[a]: 4\n",
}

# Each value of these is wrong.
MANY: dict[str, bytes] = {
    "models": b"merge_method: nan\nmodels: [" + b"a," * 5_000 + b"]\n",
    "keys": b"".join(b"k%d: 1\n" % n for n in range(5_000)),
}
