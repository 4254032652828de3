"""How a host that has only a shell gets the environment of an image.

probe.py       what the host has                 probe.sh, verify.sh
bundle.py      what it is sent, and the digest that names the environment
build.py       the environment, made once        build.sh; removed again: clean.sh; used: agent.sh
tools.py       whether uv makes it, the host's or our own copy (own_uv.py), or Python's venv and pip
progress.py    what pip and uv tell meanwhile, in plain words
installer.py   pip, uv and git with credentials  installer.sh, askpass.sh
byte_check.py  whether a command passes bytes on unchanged      echo.sh
scripts.py     reads, fills in and runs all of these scripts
"""
