set -e; export HOME=/tmp/h GIT_AUTHOR_DATE=@1000000000 GIT_COMMITTER_DATE=@1000000000; mkdir -p $HOME; cd $HOME
git config --global user.name n; git config --global user.email e@f; git config --global init.defaultBranch main; git config --global gc.auto 0
git init -q r; cd r; for i in $(seq 60); do seq $i >f$i; done; git add .; git commit -qm one; git switch -qc side; echo x >>f1; git commit -qam two
git switch -q main; echo y >>f2; git commit -qam three; git merge -q -m merged side; git log --oneline --graph | cat; git status --short; git fsck --no-progress
cd ..; git clone -q r c; cd c; git log -1 --format=%H; git diff HEAD~1 --stat | tail -1; git gc -q; git count-objects -v | grep in-pack; git grep -c 60 | tail -1
git tag v1; git archive v1 | tar t | wc -l; git stash list; git blame -s f1 | tail -1
