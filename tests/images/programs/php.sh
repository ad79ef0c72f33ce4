# PHP's own server, asked by a client inside.
D=$(mktemp -d); cd $D; cat > index.php <<'P'
<?php header('X-A: b'); session_start(); $_SESSION['n']=($_SESSION['n']??0)+1; echo "hi ".$_SERVER['REQUEST_URI']." ".strlen(file_get_contents('php://input'))."\n";
P
cat > c.php <<'P'
<?php
$n=+(getenv('N')?:100); $t=microtime(true); $ok=0;
for($i=0;$i<$n;$i++){ $r=file_get_contents("http://127.0.0.1:8088/$i",false,stream_context_create(['http'=>['method'=>'POST','content'=>str_repeat('x',$i),'header'=>'Content-Type: text/plain']])); if($r==="hi /$i $i\n")$ok++; else echo $r;}
echo "ok $ok\n"; if(getenv('TIME'))echo "figure php -S and a client, sessions, a connection a request, req/s: ".intval($n/(microtime(true)-$t))."\n";
$a=[];for($i=0;$i<100000;$i++)$a["k$i"]=$i;sort($a);echo array_sum($a),"\n";
$p=proc_open(['cat'],[['pipe','r'],['pipe','w']],$pp);fwrite($pp[0],"through");fclose($pp[0]);echo stream_get_contents($pp[1]),proc_close($p),"\n";
echo trim(shell_exec('echo sh')),"\n"; $f=tempnam('/tmp','p');file_put_contents($f,'x',LOCK_EX);echo filesize($f),"\n";unlink($f);
P
php -S 127.0.0.1:8088 index.php 2>/dev/null & S=$!; for i in $(seq 50); do curl -s http://127.0.0.1:8088/ >/dev/null && break; sleep 0.1; done
php c.php; kill $S; wait $S; echo rc $?; rm -rf $D
