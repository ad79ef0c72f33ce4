// An http server and its clients in one process, workers, children, files.
const http=require('http'),fs=require('fs'),cp=require('child_process'),os=require('os'),path=require('path');
const {Worker,isMainThread,parentPort,workerData}=require('worker_threads');
if(!isMainThread){let s=0;for(let i=0;i<workerData;i++)s=(s*31+i)%1000003;parentPort.postMessage(s);}
else (async()=>{
 const d=fs.mkdtempSync('/tmp/nodet-');
 fs.writeFileSync(path.join(d,'a'),'hello');
 await fs.promises.appendFile(path.join(d,'a'),' world');
 console.log('fs',await fs.promises.readFile(path.join(d,'a'),'utf8'),(await fs.promises.readdir(d)).join());
 const w=fs.watch(d); const ev=new Promise(r=>w.on('change',(t,f)=>r(t+':'+f)));
 fs.writeFileSync(path.join(d,'b'),'x'); console.log('watch',await ev); w.close();
 console.log('cp',cp.execFileSync('sh',['-c','echo out; exit 0']).toString().trim());
 const ch=cp.spawn('cat'); let got='';ch.stdout.on('data',c=>got+=c);ch.stdin.end('through cat');
 await new Promise(r=>ch.on('close',r)); console.log('spawn',got);
 const f=cp.fork(__dirname+'/child.js'); const m=await new Promise(r=>{f.on('message',r);f.send({n:20})}); console.log('fork',JSON.stringify(m)); f.disconnect();
 const ws=await Promise.all([1e5,2e5,3e5,4e5].map(n=>new Promise((r,j)=>{const w=new Worker(__filename,{workerData:n});w.on('message',r);w.on('error',j)})));
 console.log('workers',ws.join());
 const srv=http.createServer((q,s)=>{s.end('you asked '+q.url)});
 await new Promise(r=>srv.listen(0,'127.0.0.1',r)); const port=srv.address().port;
 const agent=new http.Agent({keepAlive:true,maxSockets:10});
 const get=u=>new Promise((r,j)=>http.get({port,path:u,agent,host:'127.0.0.1'},s=>{let b='';s.on('data',c=>b+=c);s.on('end',()=>r(b))}).on('error',j));
 console.log('http',await get('/x'));
 const t=process.hrtime.bigint(); const N=+(process.env.N||300);
 await Promise.all([...Array(N).keys()].map(i=>get('/'+i)));
 if(process.env.TIME)console.log('figure http server and keep-alive clients in one process, req/s:',Math.round(N/(Number(process.hrtime.bigint()-t)/1e9)));
 agent.destroy();srv.close();
 const z=require('zlib'),c=require('crypto'); console.log(z.gunzipSync(z.gzipSync(Buffer.alloc(1e6,'ab'))).length,(await new Promise(r=>c.pbkdf2('a','b',1000,16,'sha256',(e,k)=>r(k.toString('hex'))))));
 process.on('SIGUSR2',()=>{console.log('signal')});process.kill(process.pid,'SIGUSR2');
 await new Promise(r=>setTimeout(r,50)); fs.rmSync(d,{recursive:true});
 console.log('dns',await require('dns').promises.lookup('localhost',{family:4}).then(x=>x.address));
})();
