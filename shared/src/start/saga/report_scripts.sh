scripts=
for name in setup.sh pre-commit.sh; do
  if [ -f "$project_dir/.openhands/$name" ]; then scripts="$scripts $name"; fi
done
echo "openhands-scripts:$scripts"
