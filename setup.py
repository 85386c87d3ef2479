"""Build of the one extension, ``triloom._C`` (C++17 + pybind11, not linked with libtorch).

Metadata lives in pyproject.toml; here is only what needs code: the source roots, the compiler
flags, and a build that compiles files in parallel and only what changed.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOTS = {"triloom": "runtime", "triloom_kernels": "kernels", "triloom_bench": "bench"}
"""Installed package -> source root that holds it; a root without its package yet is left out."""

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for pattern in ("*.h", "*.hpp") for path in Path("csrc").glob(pattern))

# No -march: one binary runs on every x86-64 and arm64, hot loops carry target_clones instead, which
# vectorise only without errno. No contraction: the same bits on every instruction set. No OpenMP.
COMPILE_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"]
COMPILE_FLAGS += ["-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
LINK_FLAGS = ["-pthread", "-ldl"]


class ParallelBuild(build_ext):
    """Compiles the sources concurrently and skips objects newer than their source and all headers."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A fixed folder: an editable install would otherwise compile in a temporary one, from scratch each time.
        self.build_temp = os.path.join("build", f"objects-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile
        newest_header = max(os.path.getmtime(path) for path in [*HEADERS, "setup.py"])

        def compile_one(source: str, output_dir: str, options: dict) -> list[str]:
            (target,) = self.compiler.object_filenames([source], output_dir=output_dir)
            needed = max(newest_header, os.path.getmtime(source))
            if not self.force and os.path.exists(target) and os.path.getmtime(target) > needed:
                return [target]
            return compile_all([source], output_dir=output_dir, **options)

        def compile_parallel(sources: list[str], output_dir: str = "", **options: object) -> list[str]:
            with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
                parts = pool.map(lambda source: compile_one(source, output_dir, options), sources)
                return [target for part in parts for target in part]

        self.compiler.compile = compile_parallel
        super().build_extensions()


def extensions() -> list[Extension]:
    """The extension, or an error that says what is missing."""
    if not SOURCES:
        sys.exit("setup.py: no csrc/*.cpp found; build triloom from a complete checkout or source distribution")
    try:
        import pybind11
    except ImportError:
        sys.exit("setup.py: pybind11 is missing; run `pip install pybind11`, or leave out --no-build-isolation")
    return [
        Extension(
            "triloom._C",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=LINK_FLAGS,
            language="c++",
        )
    ]


PRESENT = {name: root for name, root in ROOTS.items() if Path(root, name).is_dir()}

setup(
    # Here and not in pyproject.toml: setuptools < 77, which GPU images still carry, refuses a plain expression
    # there, and later ones will refuse the table that older ones want.
    license="Apache-2.0",
    packages=[p for name, root in PRESENT.items() for p in find_packages(root, include=[name, f"{name}.*"])],
    package_dir={name: f"{root}/{name}" for name, root in PRESENT.items()},
    package_data={"": ["py.typed", "*.pyi", "*.toml"], "triloom_kernels": ["tuning/*.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": ParallelBuild},
    zip_safe=False,
)
