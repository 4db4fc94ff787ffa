"""Constants that clients read: where the package lies, what its library is called."""

import pathlib

DYNAMIC_LIBRARY_SUFFIX = ".so"
PACKAGE_DIR = pathlib.Path(__file__).parent
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"  # the home of this interface
NONPYTORCH_DOC_URL = PACKAGE_GITHUB_URL  # one library serves every CUDA: there is no page on choosing among several
