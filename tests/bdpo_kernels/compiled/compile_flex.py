"""Compile FlexAttention with this project's masks for a GPU that is not here: JSON, a record a kernel.

python tests/bdpo_kernels/compiled/compile_flex.py [--targets sm_90 ...] [--layers "Llama 3 8B" ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import offline
import torch._inductor.runtime.triton_helpers as triton_helpers
import triton
from flex_lowering import LAYERS, generated, pretending
from machine_code import resource_usage

_KERNEL = re.compile(r"(\w+) = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
_PRODUCTS = re.compile(r"wgmma\.mma|tcgen05\.mma|mma\.sync")


def kernels(source: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Import each kernel that inductor has written into `source`."""
    for match in _KERNEL.finditer(source):
        name, text = match[2], match[3].replace("\\\\", "\\")
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield name, getattr(module, name)


def compiled(kernel: Any, target: offline.Target) -> Any:
    """Compile inductor's `kernel` in its first configuration."""
    chosen, function = kernel.configs[0], kernel.fn
    constants = dict(kernel.triton_meta["constants"]) | chosen.kwargs
    by_name = {key if isinstance(key, str) else function.arg_names[key]: value for key, value in constants.items()}
    types = kernel.triton_meta["signature"]
    signature = {n: "constexpr" if n in by_name else types.get(n, "constexpr") for n in function.arg_names}
    source = triton.compiler.ASTSource(
        function,
        signature,
        {(function.arg_names.index(name),): value for name, value in by_name.items()},
        kernel.triton_meta["configs"][0],
    )
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return triton.compile(source, target=target.gpu, options=options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["sm_90"])
    parser.add_argument("--layers", nargs="+", default=[layer.name for layer in LAYERS])
    options = parser.parse_args()
    # Inductor's helpers would otherwise look for the device again.
    triton_helpers.set_driver_to_gpu = lambda: None
    records = []
    for target in (offline.TARGETS[name] for name in options.targets):
        for layer in (layer for layer in LAYERS if layer.name in options.layers):
            for direction, source in generated(layer, target).items():
                records += _records(target, source, {"layer": layer.name, "direction": direction})
    print(json.dumps(records))


def _records(target: offline.Target, source: str, head: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder, pretending(target):
        for name, kernel in kernels(source, Path(folder)):
            record: dict[str, Any] = head | {"target": target.name, "kernel": name, "limit": target.shared_block}
            try:
                binary = compiled(kernel, target)
            except Exception as error:
                found.append(record | {"fault": f"does not compile: {type(error).__name__}: {str(error)[-300:]}"})
                continue
            usage = resource_usage(binary.asm["cubin"])
            record |= {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}
            record |= {"shared": binary.metadata.shared, "products": len(_PRODUCTS.findall(binary.asm["ptx"]))}
            found.append(record)
    return found


if __name__ == "__main__":
    main()
