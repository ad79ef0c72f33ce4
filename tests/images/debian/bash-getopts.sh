f() { while getopts ab:c o; do echo $o $OPTARG; done; }; f -a -b x -c; printf '%q %5.2f %x\n' 'a b' 3.14159 255
