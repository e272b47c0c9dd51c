"""How to ask the adapter without this demonstration: commands and code that can be copied."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from tenora_client.environment import DEFAULT_URL, credentials_path


def how_to_go_on(url: str | None, name: str, question: str) -> str:
    """Text with a curl and an openai call. `url` None means that the server has to be started again first."""
    lines = ["", "How to go on"]
    if url is None:
        url = DEFAULT_URL
        lines += ["  Start the server; the adapter is still there:", f"    {_command('tenora')} serve"]
    key_file = credentials_path()
    from_environment = bool(os.environ.get("TENORA_API_KEY"))
    place = "the variable TENORA_API_KEY" if from_environment else str(key_file)
    shell_key = "$TENORA_API_KEY" if from_environment else f"$(cat {shlex.quote(str(key_file))})"
    python_key = 'os.environ["TENORA_API_KEY"]' if from_environment else f'open("{key_file}").read().strip()'
    chat = f'"messages": [{{"role": "user", "content": "{question}"}}]'
    return "\n".join(
        [
            *lines,
            f"  The API key is in {place}.",
            "",
            f"    curl {url}/v1/chat/completions \\",
            f'      -H "Authorization: Bearer {shell_key}" -H "Content-Type: application/json" \\',
            f"""      -d '{{"model": "{name}", "temperature": 0, {chat}}}'""",
            "",
            *(["    import os"] if from_environment else []),
            "    from openai import OpenAI",
            f'    client = OpenAI(base_url="{url}/v1", api_key={python_key})',
            f'    messages = [{{"role": "user", "content": "{question}"}}]',
            f'    answer = client.chat.completions.create(model="{name}", temperature=0, messages=messages)',
            "    print(answer.choices[0].message.content)",
        ]
    )


def _command(name: str) -> str:
    """The installed command, as short as it can be written from here."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
