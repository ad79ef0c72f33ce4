// Threads, monitors, garbage, NIO, mapped files, children, traps that the virtual machine handles itself.
import java.util.*;import java.util.concurrent.*;import java.nio.*;import java.nio.channels.*;import java.nio.file.*;import java.net.*;import java.io.*;
public class App{
 public static void main(String[] a)throws Exception{
  ExecutorService ex=Executors.newFixedThreadPool(8);List<Future<Long>> fs=new ArrayList<>();
  for(int i=0;i<32;i++){final int k=i;fs.add(ex.submit(()->{long s=0;for(int j=0;j<200000;j++)s=s*31+j*k;return s;}));}
  long s=0;for(Future<Long> f:fs)s^=f.get();System.out.println("threads "+s);
  // GC pressure
  List<byte[]> keep=new ArrayList<>();long sum=0;for(int i=0;i<20000;i++){byte[] b=new byte[20000];b[i%20000]=1;sum+=b.length;if(i%100==0)keep.add(b);}
  System.out.println("gc "+sum+" "+keep.size());
  // contention
  final Object lock=new Object();final int[] c={0};Thread[] ts=new Thread[4];
  for(int i=0;i<4;i++){ts[i]=new Thread(()->{for(int j=0;j<5000;j++)synchronized(lock){c[0]++;if(j%100==0)try{lock.wait(1);}catch(InterruptedException e){}else lock.notify();}});ts[i].start();}
  for(Thread t:ts)t.join();System.out.println("monitor "+c[0]);
  // NIO
  Selector sel=Selector.open();ServerSocketChannel ss=ServerSocketChannel.open();ss.bind(new InetSocketAddress("127.0.0.1",0));ss.configureBlocking(false);ss.register(sel,SelectionKey.OP_ACCEPT);
  int port=((InetSocketAddress)ss.getLocalAddress()).getPort();
  Thread server=new Thread(()->{try{int closed=0;ByteBuffer buf=ByteBuffer.allocateDirect(4096);while(closed<10){sel.select();Iterator<SelectionKey> it=sel.selectedKeys().iterator();while(it.hasNext()){SelectionKey k=it.next();it.remove();if(k.isAcceptable()){SocketChannel sc=ss.accept();sc.configureBlocking(false);sc.register(sel,SelectionKey.OP_READ);}else{SocketChannel sc=(SocketChannel)k.channel();buf.clear();int n=sc.read(buf);if(n<0){sc.close();closed++;}else{buf.flip();while(buf.hasRemaining())sc.write(buf);}}}}}catch(Exception e){e.printStackTrace();}});server.start();
  long t1=System.nanoTime();
  List<Future<Integer>> r=new ArrayList<>();for(int i=0;i<10;i++)r.add(ex.submit(()->{int ok=0;try(Socket so=new Socket("127.0.0.1",port)){OutputStream o=so.getOutputStream();DataInputStream in=new DataInputStream(so.getInputStream());byte[] m=new byte[100];for(int j=0;j<100;j++){m[0]=(byte)j;o.write(m);in.readFully(m);if(m[0]==(byte)j)ok++;}}return ok;}));
  int ok=0;for(Future<Integer> f:r)ok+=f.get();server.join();System.out.println("nio "+ok);
  if(System.getenv("TIME")!=null)System.out.println("figure echo over a Selector, 8 threads, messages/s: "+(long)(1000/((System.nanoTime()-t1)/1e9)));
  Path p=Files.createTempFile("x","y");try(FileChannel fc=FileChannel.open(p,StandardOpenOption.READ,StandardOpenOption.WRITE)){MappedByteBuffer m=fc.map(FileChannel.MapMode.READ_WRITE,0,1<<20);for(int i=0;i<1<<20;i+=4096)m.put(i,(byte)7);m.force();FileLock l=fc.lock();l.release();}
  System.out.println("map "+Files.readAllBytes(p)[8192]+" "+Files.size(p));Files.delete(p);
  Process pr=new ProcessBuilder("sh","-c","cat; echo done").start();pr.getOutputStream().write("in\n".getBytes());pr.getOutputStream().close();System.out.println("proc "+new String(pr.getInputStream().readAllBytes()).replace("\n","|")+pr.waitFor());
  WatchService ws=FileSystems.getDefault().newWatchService();Path d=Files.createTempDirectory("w");d.register(ws,StandardWatchEventKinds.ENTRY_CREATE);Files.createFile(d.resolve("n"));System.out.println("watch "+ws.take().pollEvents().get(0).context());Files.delete(d.resolve("n"));Files.delete(d);
  ScheduledExecutorService se=Executors.newScheduledThreadPool(1);CountDownLatch cl=new CountDownLatch(5);se.scheduleAtFixedRate(cl::countDown,1,10,TimeUnit.MILLISECONDS);cl.await();se.shutdownNow();ex.shutdown();
  try{int[] z=new int[1];String n=null;n.length();}catch(NullPointerException e){System.out.println("npe");}
  try{so(0);}catch(StackOverflowError e){System.out.println("so");}
 }
 static int so(int n){return so(n+1)+1;}
}
