"""Kernels from other packages: whoever lists a function in the entry-point group `bitsandbytes.backends` is called.

The function takes no arguments and registers kernels for its device with bitsandbytes._ops.register_kernel(), or with
torch.library itself.  It is called once, at the end of `import bitsandbytes`.  The library's own kernels, for the CPU
and for CUDA, need none of this.
"""

from importlib import metadata

GROUP = "bitsandbytes.backends"


def load() -> None:
    """Load and call every entry point of the group. RuntimeError naming the first that fails."""
    for entry in metadata.entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:
            owner = f"package {entry.dist.name}" if entry.dist else "unknown package"
            raise RuntimeError(
                f"backend {entry.name!r} ({entry.value}, {owner}) failed: {type(error).__name__}: {error}. "
                "Update that package for this version of bitsandbytes, or uninstall it."
            ) from error
