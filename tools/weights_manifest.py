"""Bring `vizattn/weights/manifest.json` up to date: `python tools/weights_manifest.py [LOCK_FILE]`.

Every released set of weights gets an entry; known sizes and hashes stay. Those of LOCK_FILE, which `vizattn weights
fetch` writes, are taken over where none are known: then all users are held to the file that was seen there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vizattn.files import write_text
from vizattn.weights import find, manifest, release_names, release_of

if __name__ == "__main__":
    seen = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")) if len(sys.argv) > 1 else {}
    entries = {}
    for name in release_names():
        if release := release_of(find(name)):
            entry = {"file": release.file_name, "size": None, "sha256": None} | manifest().get(name, {})
            if not entry["sha256"] and name in seen:
                entry |= {key: seen[name][key] for key in ("size", "sha256")}
            entries[name] = entry
    path = Path(__file__).parents[1] / "vizattn" / "weights" / "manifest.json"
    write_text(path, json.dumps(entries, indent=2, sort_keys=True) + "\n")
    print(f"{len(entries)} releases, {sum(bool(entry['sha256']) for entry in entries.values())} with a known hash.")
