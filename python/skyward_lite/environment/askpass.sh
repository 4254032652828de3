#!/bin/sh
# The program that git runs for a user name or a password: it prints the answer to the question in $1, which is "Username
# for 'https://host/path': " or "Password for 'https://user@host/path': ". The function `answer`, which installer.py
# writes before this text, knows the answers. The host must be exactly the one that has credentials: a server may send
# git to any other host, and to any path there.
url=${1#*\'}
url=${url%\'*}
rest=${url#*://}
authority=${rest%%/*}
path=${rest#"$authority"}
path=${path%/}
site=${url%%://*}://${authority##*@}
# Print the password that the user's own configuration of git has for the user name in standard input. Where it has none
# the user name is a token, and the password is empty.
stored() (
  unset GIT_CONFIG_COUNT
  export GIT_ASKPASS=true
  { printf 'protocol=%s\nhost=%s\npath=%s\nusername=' "${site%%://*}" "${site#*://}" "${path#/}"; cat; echo; } |
    git credential fill 2>/dev/null | sed -n 's/^password=//p'
)
answer "${1%% *} $site${path%.git}" || answer "${1%% *} $site"
