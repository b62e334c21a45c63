#!/usr/bin/env bash
# NVIDIA's perf_analyzer into a folder: usage install_perf_analyzer.sh PYTHON FOLDER. Nothing is installed into the system.
#
# Its program wants glibc 2.38. On an older Debian (12: 2.36) the loader and six libraries of Debian 13 are unpacked beside it, from the
# mirror that this machine uses anyway; FOLDER/perf_analyzer then starts the program by that loader.
set -euo pipefail
python=$(realpath -s "$(command -v "$1")") folder=$2 version=2.60.0
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$folder"
"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --platform manylinux_2_38_x86_64 --python-version 311 -d wheel "perf-analyzer==$version"
"$python" -m zipfile -e wheel/*.whl unpacked
program=$folder/unpacked/perf_analyzer/bin/perf_analyzer
chmod +x "$program"
command=$program
glibc=$(getconf GNU_LIBC_VERSION | awk '{print $2}')
if [ "$(printf '%s\n2.38\n' "$glibc" | sort -V | tail -1)" != "$glibc" ]; then
  command -v apt-get >/dev/null || { echo "glibc $glibc is older than 2.38 and this is no Debian; run it elsewhere"; exit 2; }
  mirror=$(apt-get indextargets --format '$(SITE)' | sort | uniq -c | sort -rn | awk '$2 ~ "/debian/*$" && !found {print $2; found = 1}')
  mkdir -p apt/lists/partial apt/cache/archives/partial debs root && touch apt/status
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > apt/sources.list
  own=(-o "Dir::Etc::sourcelist=$folder/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$folder/apt/lists"
       -o "Dir::Cache=$folder/apt/cache" -o "Dir::State::status=$folder/apt/status" -o APT::Get::List-Cleanup=0 -o APT::Sandbox::User=root)
  apt-get "${own[@]}" -qq update
  (cd debs && apt-get "${own[@]}" -qq download libc6 libstdc++6 libgcc-s1 libssl3t64 zlib1g libzstd1)
  for package in debs/*.deb; do dpkg-deb -x "$package" root; done
  loader=$(find root -name ld-linux-x86-64.so.2 | head -1)
  command="$folder/$loader --library-path $folder/root/usr/lib/x86_64-linux-gnu $program"
fi
printf '#!/bin/sh\nexec %s "$@"\n' "$command" > perf_analyzer
chmod +x perf_analyzer
./perf_analyzer --version
