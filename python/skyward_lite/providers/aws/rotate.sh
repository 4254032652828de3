# shellcheck shell=sh
# Makes a host key that nobody else has seen, lets the server use it, and prints its public half.
echo '== skyward_lite =='
sudo -n sh -s <<'ROOT_ENDS_HERE' || exit
umask 077
cd /etc/ssh || exit
rm -f .skyward .skyward.pub
ssh-keygen -q -t ed25519 -N '' -C '' -f .skyward || exit
chmod 644 .skyward.pub
mv -f .skyward ssh_host_ed25519_key && mv -f .skyward.pub ssh_host_ed25519_key.pub || exit
# A restart ends the listener only: sessions, this one too, live on.
systemctl restart ssh.service 2>/dev/null || systemctl restart sshd.service || exit
ROOT_ENDS_HERE
printf 'key=%s\n' "$(cat /etc/ssh/ssh_host_ed25519_key.pub)"
