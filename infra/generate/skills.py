"""Prints the list of public skills for `functions/settings/src/public_skills.json`.

Its argument is the folder of the unpacked npm package @openhands/extensions, which is a copy of the repository from which agent servers load
public skills (docs/operations.md, "The list of public skills"):

    npm pack @openhands/extensions && tar xzf openhands-extensions-*.tgz
    python3 infra/generate/skills.py package > functions/settings/src/public_skills.json

Only names, categories and triggers are kept: an agent server has the skills themselves.
"""

import json
import sys
from pathlib import Path

CATALOG = "export const SKILLS_CATALOG = "


def main():
    package = Path(sys.argv[1])
    text = (package / "skills/index.js").read_text()
    skills, _ = json.JSONDecoder().raw_decode(text[text.index(CATALOG) + len(CATALOG) :])
    rows = [
        {"name": skill["name"], "category": skill.get("category") or "other", "triggers": skill.get("triggers") or []}
        for skill in sorted(skills, key=lambda skill: skill["name"])
    ]
    print("[\n" + ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows) + "\n]")
    print(f"{len(rows)} skills of {json.loads((package / 'package.json').read_text())['version']}", file=sys.stderr)


if __name__ == "__main__":
    main()
