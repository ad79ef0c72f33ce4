# A static Go program, compiled and run inside.
here=$(cd "$(dirname "$0")" && pwd)
cd "$(mktemp -d)" && cp "$here/server.go" .
export GOCACHE=$PWD/cache HOME=$PWD GO111MODULE=off CGO_ENABLED=0
go build -o server server.go && ./server
