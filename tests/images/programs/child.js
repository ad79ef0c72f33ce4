process.on('message',m=>{process.send({sq:m.n*m.n})})
