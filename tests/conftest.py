"""What holds for every test: no network, and so no accidental download of a checkpoint."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
