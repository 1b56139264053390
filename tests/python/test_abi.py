"""The declarations in `_abi` against the loaded library and against a C compiler."""

import ctypes
import shutil
import subprocess

import pytest
from conftest import ROOT

import kvtier
from kvtier import _abi


def test_the_library_has_the_version_that_the_package_is_for():
    assert kvtier.library_version() == kvtier.__version__
    major, minor, patch = map(int, kvtier.__version__.split("."))
    assert kvtier.library().version() == major * 10000 + minor * 100 + patch


@pytest.mark.parametrize("name", sorted(_abi.STRUCTS))
def test_struct_sizes_are_those_of_the_library(name):
    assert kvtier.library().struct_size(name.encode()) == ctypes.sizeof(_abi.STRUCTS[name])


def test_every_field_lies_where_a_c_compiler_puts_it(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = ["#include <stdio.h>", '#include "runtime/kvtier.h"', "int main(void) {"]
    expected = []
    for name, struct in _abi.STRUCTS.items():
        for field, _ in struct._fields_:
            lines.append(
                f'  printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), '
                f"sizeof((({name}*)0)->{field}));"
            )
            place = getattr(struct, field)
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    lines += ["  return 0;", "}"]
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines))
    program = tmp_path / "layout"
    subprocess.run([compiler, f"-I{ROOT}", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert found.split("\n")[:-1] == expected


def test_defaults_are_those_of_the_library():
    struct = _abi.Options()
    kvtier.library().options_init(ctypes.byref(struct), ctypes.sizeof(struct))
    options = kvtier.Options(query_heads=1, kv_heads=1, head_dim=8, tokens_max=8)
    for name in ("tokens_per_block", "kv_heads_per_block", "extent_bytes", "sinks", "window",
                 "layers", "sequences_max", "look_ahead_bytes", "softmax_scale"):
        assert getattr(options, name) == getattr(struct, name), name
    assert struct.dtype == _abi.DTYPES[options.dtype]
    assert struct.reduction == _abi.REDUCTIONS[options.reduction]
    assert struct.rest == _abi.RESTS[options.rest]


def test_selectors_are_listed_with_what_they_need():
    names = [entry["name"] for entry in kvtier.selectors()]
    assert {"scan", "mean", "full", "random"} <= set(names)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(_abi, "VERSION", (9, 9))
    with pytest.raises(ImportError, match="9.9"):
        _abi.load()


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(_abi, "_candidates", lambda: [])
    with pytest.raises(ImportError, match="KVTIER_LIBRARY"):
        _abi.load()
