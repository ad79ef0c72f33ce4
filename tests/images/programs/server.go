// Goroutines, channels, an http server and its clients, the collector, children, signals, a nil pointer.
package main
import ("fmt";"io";"net";"net/http";"os";"os/exec";"runtime";"sync";"time";"os/signal";"syscall")
func main(){
 var wg sync.WaitGroup; c:=make(chan int,10); s:=0; var mu sync.Mutex
 for i:=0;i<1000;i++{wg.Add(1);go func(i int){defer wg.Done();x:=0;for j:=0;j<1000;j++{x+=i*j%7};mu.Lock();s+=x;mu.Unlock()}(i)}
 wg.Wait(); fmt.Println("goroutines",s)
 go func(){for i:=0;i<10000;i++{c<-i};close(c)}(); t:=0; for v:=range c{t+=v}; fmt.Println("chan",t)
 l,_:=net.Listen("tcp","127.0.0.1:0"); go http.Serve(l,http.HandlerFunc(func(w http.ResponseWriter,r *http.Request){fmt.Fprintf(w,"hi %s",r.URL.Path)}))
 cl:=&http.Client{Transport:&http.Transport{MaxIdleConnsPerHost:10}}
 n:=500; t0:=time.Now(); ok:=0; jobs:=make(chan int)
 for k:=0;k<10;k++{wg.Add(1);go func(){defer wg.Done();for i:=range jobs{r,e:=cl.Get(fmt.Sprintf("http://%s/%d",l.Addr(),i));if e!=nil{fmt.Println(e);continue};b,_:=io.ReadAll(r.Body);r.Body.Close();if string(b)==fmt.Sprintf("hi /%d",i){mu.Lock();ok++;mu.Unlock()}}}()}
 for i:=0;i<n;i++{jobs<-i};close(jobs);wg.Wait(); fmt.Println("http",ok)
 if os.Getenv("TIME")!=""{fmt.Println("figure net/http, 10 clients, keep-alive, req/s:",int(float64(n)/time.Since(t0).Seconds()))}
 for i:=0;i<50;i++{b:=make([]byte,10<<20);b[i]=1;_=b}; runtime.GC(); fmt.Println("gc")
 o,e:=exec.Command("sh","-c","echo sub").Output(); fmt.Print(string(o),e,"\n")
 sg:=make(chan os.Signal,1); signal.Notify(sg,syscall.SIGUSR1); syscall.Kill(os.Getpid(),syscall.SIGUSR1); fmt.Println(<-sg)
 tk:=time.NewTicker(5*time.Millisecond); for i:=0;i<5;i++{<-tk.C}; fmt.Println("ticks")
 func(){defer func(){fmt.Println("recovered",recover())}();var p *int;*p=1}()
}
