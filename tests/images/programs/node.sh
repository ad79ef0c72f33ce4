# node: an http server and its clients in one process, workers, children, files.
exec node "$(dirname "$0")/node.js"
