"""`python -m spectraqlora STEP …`: the entry point of the step images."""

import os
import sys

# KFP's runtime part needs none of the dependencies of its compiler.
os.environ.setdefault("_KFP_RUNTIME", "true")

from spectraqlora.runtime.command_line import main

main(sys.argv[1:])
