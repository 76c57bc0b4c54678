"""What ends up in a model folder: the model code, and the templates it is rendered from."""

import sys

from liger_cli.checkpoint.model_code import GlueImporter

sys.meta_path.append(GlueImporter())
