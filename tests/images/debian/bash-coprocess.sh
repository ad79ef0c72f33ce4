coproc bc_ { while read l; do echo $((l * 2)); done; }; echo 21 >&${bc__[1]}; read r <&${bc__[0]}; echo $r
