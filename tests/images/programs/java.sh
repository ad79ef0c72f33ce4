# Java, compiled and run inside.
here=$(cd "$(dirname "$0")" && pwd)
cd "$(mktemp -d)" && cp "$here/App.java" . && javac App.java && java -Xmx256m App
