"""`python -m spectraqlora_pipelines.cli`."""

from spectraqlora_pipelines.cli.app import main

main()
