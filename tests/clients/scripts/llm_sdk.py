import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ASKED, MODEL, TOKENS, URL, tell

with tempfile.TemporaryDirectory() as folder:
    listed = f"- model_id: kvist\n  model_name: {MODEL}\n  api_base: {URL}/v1\n"
    (Path(folder) / "extra-openai-models.yaml").write_text(listed)
    command = [sys.executable, "-m", "llm", "-m", "kvist", "-o", "temperature", "0", "-o", "max_tokens", str(TOKENS)]
    environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
    done = subprocess.run([*command, ASKED], env=environment, capture_output=True, text=True, check=True)
tell(text=done.stdout)
