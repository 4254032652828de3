"""The manifests of the page about Kubernetes: their shell programs, and the agents that they find."""

from __future__ import annotations

import re
import subprocess

import skyward_lite as sky
import yaml
from snippets import ROOT

PAGE = ROOT / "docs" / "kubernetes.md"


def test_the_agent_of_a_pod_is_found():
    """The command that drains a pod finds an agent that runs, and nothing of itself."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    manifests = {part["kind"]: part for block in blocks for part in yaml.safe_load_all(block)}
    assert manifests.keys() == {"StatefulSet", "Role", "RoleBinding"}
    container = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    for first, second, script in (container["command"], container["lifecycle"]["preStop"]["exec"]["command"]):
        assert [first, second] == ["sh", "-c"]
        subprocess.run(["sh", "-n", "-c", script], check=True)
    search, _, ends_them = script.partition("\nfor pid in ")
    assert "kill -TERM" in ends_them
    with sky.pool(plugins=[]) as pool:
        (node,) = pool.nodes()
        found = subprocess.run(["sh", "-c", f"{search}\nagents"], capture_output=True, text=True, check=False)
    assert str(node.pid) in found.stdout.split()
