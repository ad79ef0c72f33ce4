dpkg -l | tail -n +6 | sha256sum
dpkg -S /bin/bash
dpkg -L dash | sort | sha256sum
dpkg --verify coreutils
apt-get --version | head -1
