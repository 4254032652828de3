# shellcheck shell=sh
# Variables of a shell's configuration that would change what Python does. Part of a command, as unsafe.sh is.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONINSPECT PYTHONPLATLIBDIR PYTHONUSERBASE;
