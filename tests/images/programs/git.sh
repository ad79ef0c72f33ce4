# git: commits, a clone through a pack, fsck, gc.
D=$(mktemp -d); cd $D; export HOME=$D GIT_AUTHOR_DATE=2020-01-01T00:00:00Z GIT_COMMITTER_DATE=2020-01-01T00:00:00Z; git config --global user.email a@b; git config --global user.name n; git config --global init.defaultBranch main
git init -q src; cd src; for i in $(seq 300); do mkdir -p d$((i%10)); seq $i > d$((i%10))/f$i; done; git add .; git commit -qm one; seq 5 > d1/f1; git mv d2/f2 d2/g; git commit -qam two; git log --format=%H | cat; cd ..
git clone -q file://$D/src copy && cd copy && git log --oneline | wc -l && git status --short | wc -l && git fsck 2>&1 | tail -1; git gc -q; git clone -q . ../third && diff -r --exclude .git . ../third && echo same; rm -rf $D
