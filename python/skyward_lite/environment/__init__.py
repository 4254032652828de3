"""How a host that has only a shell gets the environment of an image.

probe.py       what the host has                 probe.sh, verify.sh
bundle.py      what it is sent, and the digest that names the environment
build.py       the environment, made once        build.sh; removed again: clean.sh; used: agent.sh
installer.py   pip, uv and git with credentials  installer.sh, askpass.sh
scripts.py     reads, fills in and runs all of these scripts
"""
