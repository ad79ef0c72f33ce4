import asyncio


async def main():
    p = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    o, _ = await p.communicate(b"z" * 50000)
    print(len(o), p.returncode)
    print(await asyncio.gather(*(asyncio.sleep(0.05, i) for i in range(20))))

    async def serve(r, w):
        w.write((await r.readline()).upper())
        await w.drain()
        w.close()

    s = await asyncio.start_unix_server(serve, "/tmp/sock")

    async def ask(i):
        r, w = await asyncio.open_unix_connection("/tmp/sock")
        w.write(f"line {i}\n".encode())
        line = await r.read()
        w.close()
        return line

    print(await asyncio.gather(*(ask(i) for i in range(10))))
    s.close()
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 0.05)
    except TimeoutError:
        print("timeout")
    print(await asyncio.to_thread(sum, range(10)))
    loop = asyncio.get_running_loop()
    e = asyncio.Event()
    import os
    import signal

    loop.add_signal_handler(signal.SIGUSR1, e.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.wait_for(e.wait(), 5)
    print("signal")


asyncio.run(main())
