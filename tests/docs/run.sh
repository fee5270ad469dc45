#!/bin/sh
# The documentation's promises: README's examples build and run, tables agree with the results they are made from, and
# every relative link leads to a file.
# run.sh [BUILD [PYTHON]]: a folder with the built library and program, and a Python with the package and torch.
set -eu
cd "$(dirname "$0")/../.."
work=build/docs
rm -rf "$work"
mkdir -p "$work"

# Tables made from results say what the results say.
python3 bench/readme_table.py --check
echo "tables: ok"

# The blocks that follow a line <!-- example -->, each in a file of its own.
awk -v dir="$work" '
  /^<!-- example -->$/ { marked = 1; next }
  marked && /^```/ { file = dir "/example-" ++count "." substr($0, 4); marked = 0; inside = 1; next }
  inside && /^```$/ { inside = 0; close(file); next }
  inside { print >> file }
' README.md docs/api.md docs/dynamo.md docs/indexer.md docs/planner.md docs/sparse.md docs/shelf.md
for language in c cpp python sh; do
  ls "$work"/example-*."$language" >/dev/null || { echo "no page has a $language example" >&2; exit 1; }
done

# quiet COMMAND...: its output only when it fails.
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

# Through the installed package, which knows what the library was built with.
build=${1:-build/release}
quiet cmake --install "$build" --prefix "$PWD/$work/prefix"
for example in "$work"/example-*; do
  case $example in
    *.cpp | *.c)
      quiet cmake -S tests/docs -B "$example.build" -G Ninja -DCMAKE_PREFIX_PATH="$PWD/$work/prefix" \
        -DEXAMPLE="$PWD/$example"
      quiet cmake --build "$example.build"
      quiet "$example.build/example"
      ;;
    *.python) quiet "${2:-.venv/bin/python}" "$example" ;;
    *.sh) quiet env PATH="$PWD/$work/prefix/bin:$PATH" sh -e "$example" ;;
    *)
      echo "an example in a language that is not run: $example" >&2
      exit 1
      ;;
  esac
  echo "$(basename "$example"): ok"
done

# [text](target), without those that name another site or a place on the same page.
broken=0
for page in *.md docs/*.md docs/*/*.md; do
  [ -f "$page" ] || continue
  for target in $(grep -o '](\([^)]*\))' "$page" | sed -e 's/^](//' -e 's/)$//' -e 's/#.*//' | grep -v '^[a-z]*:' | sort -u); do
    [ -e "$(dirname "$page")/$target" ] || { echo "$page: link to $target, which does not exist" >&2; broken=1; }
  done
done
[ "$broken" = 0 ]
echo "links: ok"
